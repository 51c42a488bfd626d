"""From a name to files on this machine: a path, an alias of manifest.toml, or a repository on the Hugging Face hub.

The network is used only when an alias or a hub id is named, never on import, and never for a path. What is in the hub's cache
is taken from there when the hub cannot be reached. Only the files that a model needs are downloaded: one set of weights a part,
safetensors where there are any; nothing that a repository holds is ever run.
"""

import difflib
import functools
import logging
import re
import tomllib
from pathlib import Path

from sdcore.errors import CheckpointError

from .checkpoint import TEXT_PARTS, weight_names
from .files import one_line

logger = logging.getLogger("sdcore")
HERE = Path(__file__).parent
TOKENIZER_REPO = "openai/clip-vit-large-patch14"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


@functools.cache
def manifest() -> dict:
    return tomllib.loads((HERE / "manifest.toml").read_text(encoding="utf-8"))


def aliases() -> list[str]:
    """All short names, the bundled model's first."""
    return ["tiny", *manifest()["model"]]


def resolve(name: str | Path, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder or file that `name` means, downloaded if it is an alias or hub id. CheckpointError that says what to do."""
    if isinstance(name, Path) or (isinstance(name, str) and name and Path(name).exists()):
        return Path(name)
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"model {one_line(repr(name))}: expected a name, folder or file")
    if name == "tiny":
        if not (HERE / "tiny" / "model_index.json").exists():
            raise CheckpointError(
                f"{HERE / 'tiny'}: the bundled model is not in this installation; install sdcore again"
            )
        return HERE / "tiny"
    known = manifest()["model"].get(name)
    if known:
        return download(
            known["repo"], revision or known.get("revision"), variant or known.get("variant"), known.get("mirrors", [])
        )
    if name.lower().endswith(WEIGHT_SUFFIXES) and name.count("/") != 2:
        raise CheckpointError(f"{one_line(name)}: no such file")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and ".." not in name:
        return download(name, revision, variant)
    near = difflib.get_close_matches(name, aliases(), n=3)
    advice = f"did you mean {' or '.join(near)}?" if near else f"names: {', '.join(aliases())}"
    raise CheckpointError(f"{one_line(name)}: no such folder or file, and no name known here; {advice}")


def download(repo: str, revision: str | None, variant: str | None, mirrors: list[str] | tuple = ()) -> Path:
    """The repository's model folder (or, for owner/name/file, that file) in the hub's cache, complete."""
    moved = manifest()["moved"].get(repo)
    if moved:
        raise CheckpointError(f"{repo}: was removed from the hub; it lives on as {moved}: load that")
    import huggingface_hub as hub
    from huggingface_hub import errors

    owner, title, *inner = repo.split("/")
    repo, file = f"{owner}/{title}", "/".join(inner)
    elsewhere = f"; the same model is at {' and '.join(mirrors)}" if mirrors else ""
    try:
        if file:
            return Path(hub.hf_hub_download(repo, file, revision=revision))
        try:
            listing = hub.list_repo_files(repo, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except Exception:  # offline: what is raised differs with the hub's version and its transport
            folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
            logger.warning(f"{repo}: the hub cannot be reached, using the copy in the cache ({folder.name})")
            return folder
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=choose(listing, repo, variant)))
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        what = f"accept its licence first at https://huggingface.co/{repo}, then `hf auth login`{elsewhere}"
    except errors.RevisionNotFoundError:
        what = f"has no revision {one_line(revision)!r}; leave it out for the newest"
    except errors.RepositoryNotFoundError:
        what = f"no such repository on the hub, or a private one (`hf auth login`){elsewhere}"
    except errors.LocalEntryNotFoundError:
        what = "not in the cache, and the hub cannot be reached (offline?); download it once while online"
    except errors.EntryNotFoundError:
        what = f"has no file {one_line(file)}"
    except Exception as error:
        what = f"download failed ({one_line(error)}); try again, what is complete is kept"
    raise CheckpointError(f"{repo}: {what}")


def choose(listing: list[str], repo: str, variant: str | None) -> list[str]:
    """Which files of a repository a model needs: configs, tokenizers, and for each part the best set of weights."""
    present = set(listing)
    if "model_index.json" not in present:
        single = sorted(file for file in present if file.endswith((".safetensors", ".ckpt")) and "/" not in file)
        raise CheckpointError(
            f"{repo}: is no model folder (no model_index.json)"
            + (f"; it holds files to load as {repo}/{single[0]}" if single else "; it is another kind of repository")
        )
    wanted = ["model_index.json"]
    for part in ("unet", "vae", *TEXT_PARTS, "tokenizer", "tokenizer_2", "scheduler"):
        inside = {file.removeprefix(f"{part}/") for file in present if file.startswith(f"{part}/")}
        if part in ("unet", "vae", *TEXT_PARTS) and inside:
            best = next((name for name in weight_names(part, variant) if name in inside), None)
            if best is None:
                raise CheckpointError(
                    f"{repo}: {part}/ has no {weight_names(part, variant)[0]}; leave variant out, or choose another"
                )
            stem, ending = best.split(".")[0], ".safetensors" if ".safetensors" in best else ".bin"
            shards = [
                name for name in inside if re.fullmatch(rf"{stem}(\.\w+)?-\d+-of-\d+(\.\w+)?{re.escape(ending)}", name)
            ]
            wanted += [f"{part}/{name}" for name in [best, *(shards if best.endswith(".json") else [])]]
        wanted += [f"{part}/{name}" for name in inside if name.endswith((".json", ".txt")) and ".index." not in name]
    return sorted(set(wanted))


def cached_tokenizer() -> Path | None:
    """CLIP's vocabulary from the hub's cache, if some model brought it here; never the network."""
    from huggingface_hub import try_to_load_from_cache

    places = [(TOKENIZER_REPO, "")] + [(known["repo"], "tokenizer/") for known in manifest()["model"].values()]
    for repo, folder in places:
        found = [try_to_load_from_cache(repo, f"{folder}{file}") for file in ("vocab.json", "merges.txt")]
        if all(isinstance(file, str) for file in found):
            return Path(str(found[0])).parent
    return None
