"""What `epops generate` is asked to do, and the prompts that it makes up where none are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

COMMAND = "epops generate"


class Order(NamedTuple):
    """Equal on every rank."""

    model: str
    """A checkpoint folder, or a family of `epops.zoo`: a small model with random weights, over bytes."""
    prompts: tuple[str, ...] = ()
    requests: int = 8
    """Where there are no prompts: so many of several lengths, for all ranks together."""
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    compiled: bool = True
    buckets: tuple[int, ...] = ()
    """Empty: powers of two up to the requests of a rank, at most 128."""
    prefill_tokens: int = 512

    def check(self) -> None:
        """Raises ValueError for what cannot be done, before any rank is started."""
        for name, least in (("requests", 1), ("max_new_tokens", 1), ("prefill_tokens", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"{COMMAND}: --{option}: expected at least {least}, got {getattr(self, name)}")
        if not Path(self.model).is_dir():
            from ..zoo import families

            known = families()
            if self.model not in known:
                raise ValueError(
                    f"{COMMAND}: --model: expected a checkpoint folder or a model family, got {self.model!r}, which is neither; "
                    f"families are {', '.join(known)}"
                )

    def build(self, group: Any) -> tuple[Any, Words]:
        """The sharded model, and how its tokens are text."""
        if Path(self.model).is_dir():
            from .load import load

            return load(self.model, group, seed=self.seed), _tokenizer(Path(self.model))
        from .. import parallelize, zoo
        from ..zoo.tweaks import MAIN

        built = zoo.tiny(self.model, self.seed, config="small" if self.model in MAIN else "tiny")
        built.generation_config.eos_token_id = None
        return parallelize(built, group).to(group.device), Words(None, built.config.get_text_config().vocab_size)

    def ids(self, words: Words) -> list[list[int]]:
        """Prompts of all ranks, as token ids."""
        if self.prompts:
            return [words.ids(prompt) for prompt in self.prompts]
        from ..demo.text import corpus

        text = corpus()[1].decode("utf-8", "replace")
        made = []
        for number in range(self.requests):
            at = 997 * (number + self.seed) % (len(text) - 64)
            made.append(words.ids(text[at : at + 8 + 5 * number % 41]))
        return made


class Words:
    """Text to token ids and back: by the folder's tokenizer, or a byte a token."""

    def __init__(self, tokenizer: Any, vocab_size: int = 0) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    def ids(self, text: str) -> list[int]:
        """
        >>> Words(None, 259).ids("héy")
        [104, 195, 169, 121]
        """
        if self.tokenizer is not None:
            return self.tokenizer(text).input_ids
        return [byte % self.vocab_size for byte in text.encode()]

    def text(self, ids: list[int]) -> str:
        """
        >>> Words(None, 259).text([104, 195, 169, 7])
        'hé\\x07'
        """
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def _tokenizer(folder: Path) -> Words:
    from transformers import AutoTokenizer

    try:
        return Words(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{COMMAND}: --model: expected a folder with a tokenizer, got {folder} [{said}]; save the tokenizer there too, by "
            "tokenizer.save_pretrained"
        ) from error
