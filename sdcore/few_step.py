"""Few-step models: how each was distilled decides how it is to be sampled, and its file mostly does not say.

A student of one to eight steps has only ever seen the noise levels of its own training. Another spacing, another sampler, or
guidance (which is distilled in already) makes blurred or burnt pictures of it, without an error. `PRESETS` is what the model
cards prescribe, as options of `Pipeline.steps`:

    pipe("a red circle", **few_step("lightning-4"))

`recognised` says which preset a model wants where that is known: from its scheduler's configuration, from a UNet that hears the
guidance scale, or from the names of its files (a Lightning or Hyper UNet is an SDXL UNet in every tensor's name and shape).

Sources: LCM (2310.04378), TCD (2402.19159), Turbo (2311.17042), Lightning (2402.13929), Hyper-SD (2404.13686) and their model
cards. Not here: Lightning's UNet of one step, which predicts x0 (give its pipeline `prediction_type="sample"`, then the options
of lightning-2 with one step), and Hyper's UNet of one step, which starts at timestep 800.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sdcore.scheduler import unknown

if TYPE_CHECKING:
    from sdcore.pipeline import Pipeline

OFF = 1.0  # guidance
TRAILING = {"schedule": "trailing", "guidance": OFF}  # begins at pure noise
PRESETS: dict[str, dict[str, Any]] = {
    "lcm": {"sampler": "lcm", "steps": 4, "guidance": OFF},
    "lcm-guided": {"sampler": "lcm", "steps": 4, "guidance": 8.0},  # whose UNet hears the scale: LCM_Dreamshaper_v7
    "tcd": {"sampler": "tcd", "steps": 4, "guidance": OFF, "eta": 0.3},
    "turbo": {"sampler": "euler_a", "steps": 1, **TRAILING},  # up to 4
    **{f"lightning-{n}": {"sampler": "euler", "steps": n, **TRAILING} for n in (2, 4, 8)},
    "hyper-1": {"sampler": "tcd", "steps": 1, "guidance": OFF, "eta": 1.0},  # also 2 to 8 steps, with a smaller eta
    **{f"hyper-{n}": {"sampler": "ddim", "steps": n, **TRAILING} for n in (2, 4, 8)},
    **{f"hyper-{n}-cfg": {"sampler": "ddim", "steps": n, **TRAILING, "guidance": 5.0} for n in (8, 12)},
}

# The presets' models by the names of their files: `{n}` is what was found.
NAMES = {
    r"lightning.*?(\d+)-?steps?": "lightning-{}",
    r"hyper-?sd.*?(\d+)-?steps?-cfg": "hyper-{}-cfg",
    r"hyper-?sd.*?(\d+)-?steps?": "hyper-{}",
    r"sd-?(?:xl)?-?turbo": "turbo",
    r"(?:^|[-/])lcm(?:[-/.]|$)": "lcm",
    r"(?:^|[-/])tcd(?:[-/.]|$)": "tcd",
}


def few_step(name: str) -> dict[str, Any]:
    """The options of `Pipeline.steps` for a kind of few-step model. ConfigError for a name that is not one of PRESETS."""
    if name not in PRESETS:
        raise unknown("few-step preset", name, PRESETS)
    return dict(PRESETS[name])


def recognised(pipe: "Pipeline", names: Iterable[str] = ()) -> tuple[str, str] | None:
    """The preset that a pipeline wants and how that is known, or None: by what it was shipped with, then by `names`, those of its
    model, folder or file and of the adapters that are on it."""
    shipped, unet = pipe.scheduler, pipe.unet.config
    if unet.guidance_dim:
        return "lcm-guided", "its UNet hears the guidance scale"
    for sampler in ("lcm", "tcd"):
        if shipped.sampler == sampler:
            return sampler, f"its scheduler is {sampler}'s"
    if (shipped.sampler, shipped.spacing, shipped.zero_snr) == ("euler_a", "trailing", False):
        return "turbo", "its scheduler is Turbo's"
    for name in names:
        spelled = re.sub(r"[\s_]+", "-", "/".join(re.split(r"[/\\]", name)[-2:]).lower())
        for pattern, preset in NAMES.items():
            found = re.search(pattern, spelled)
            preset = preset.format(*found.groups()) if found else ""
            if preset in PRESETS:
                return preset, f"by the name {name}"
    return None
