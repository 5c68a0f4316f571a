"""The tokenizer: a byte-level BPE trained once on the corpus and cached, or any Hugging Face one
by path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from effprof.errors import UsageError
from effprof.trainer.corpus import DatasetCorpus, FileCorpus
from effprof.trainer.files import home, write_whole

END = "<|endoftext|>"
MAX_VOCAB = 8192
_TRAINING_CHARACTERS = 20_000_000


def tokenizer(corpus: FileCorpus | DatasetCorpus, vocab: int, path: str | None) -> Any:
    """A transformers fast tokenizer whose ids lie below ``vocab``. Raises UsageError."""
    from transformers import PreTrainedTokenizerFast

    if path:
        chosen = _load(path)
        if chosen.eos_token_id is None:
            raise UsageError(
                f"The tokenizer {path!r} has no end-of-text token.", "Give one that has eos_token."
            )
        if len(chosen) > vocab:
            raise UsageError(
                f"The tokenizer {path!r} has {len(chosen)} tokens, the model only {vocab}.",
                "Give a smaller tokenizer or a model with a larger vocab_size.",
            )
        return chosen
    size = min(vocab, MAX_VOCAB)
    key = corpus.fingerprint() if isinstance(corpus, FileCorpus) else corpus.name.replace("/", "--")
    cached = home() / "tokenizers" / f"{key}-{size}.json"
    if not cached.exists():
        write_whole(cached, _train(_sample(corpus), size))
    return PreTrainedTokenizerFast(tokenizer_file=str(cached), eos_token=END, pad_token=END)


def _load(path: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path.endswith(".json"):
        if not Path(path).is_file():
            raise UsageError(
                f"--tokenizer {path!r} does not exist.", "Give a tokenizer.json or a folder."
            )
        return PreTrainedTokenizerFast(tokenizer_file=path, eos_token=END)
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as problem:  # noqa: BLE001 - transformers raises many kinds
        raise UsageError(
            f"Cannot load the tokenizer {path!r}: {type(problem).__name__}.",
            "Give a folder saved by save_pretrained, a tokenizer.json, or a name on the hub.",
        ) from None


def _sample(corpus: FileCorpus | DatasetCorpus) -> Iterator[str]:
    """The corpus's first training documents, up to a fixed number of characters."""
    if isinstance(corpus, FileCorpus):
        documents: Iterable[str] = corpus.documents("train")
    else:
        documents = (row["text"] for row in corpus.stream("train"))
    seen = 0
    for text in documents:
        yield text
        seen += len(text)
        if seen > _TRAINING_CHARACTERS:
            return


def _train(documents: Iterable[str], size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    return str(made.to_str())
