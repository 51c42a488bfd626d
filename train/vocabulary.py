"""Make the bundled model's byte-pair vocabulary: CLIP's scheme, learned from the words of the world.

The file layout and the spelling are CLIP's, only smaller: every byte, every byte at the end of a word, then one token a merge,
then start and end. Every word of the world becomes one token; any other text is still spelled, by bytes. The result is read by
sdcore's Tokenizer and by transformers' CLIPTokenizer alike.
"""

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sdcore.tokenizer import END, START, WORD_END, clip_vocabulary

LENGTH = 32  # tokens a prompt, start and end among them: the longest caption of the world has 26


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one token. Source: Sennrich et al. 2016, algorithm 1.

    Of pairs that are equally frequent the first in the alphabet goes first: the same words always give the same tokens.
    (The trainer of the library `tokenizers` leaves that to chance, and ids of one run mean other words in the next.)
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for symbols in spelled for pair in itertools.pairwise(symbols)):
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        spelled = [merged(symbols, pair) for symbols in spelled]
        merges.append(pair)
    return merges


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with every occurrence of `pair` made one, from the left."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def write(folder: Path, words: Sequence[str]) -> None:
    """Write tokenizer/ of the diffusers layout: vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(merges), ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
