"""The demo's tokenizer: bytes, three special tokens, and one token per known word.

Knows how text becomes ids. Refuses to know what the text means. The vocabulary is written down, not
learnt: with `ignore_merges` a known word is looked up whole, and any other text falls apart into bytes,
so there is nothing that cannot be tokenized.
"""

from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tracer.demo.data import known_words

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPACE = "Ġ"  # how byte-level BPE writes a leading space
SENTENCE_STARTS = ("The", "the")  # the words that are also one token without a space before them


@lru_cache(maxsize=1)
def _byte_symbols() -> tuple[str, ...]:
    return tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))


def vocabulary() -> dict[str, int]:
    """Every token and its id: specials, the 256 bytes, then the words."""
    words = [*SENTENCE_STARTS, *(SPACE + word for word in known_words())]
    return {token: index for index, token in enumerate([BOS, EOS, PAD, *_byte_symbols(), *words])}


def build(context_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer, adding BOS by itself as Llama's does."""
    vocab = vocabulary()
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, PAD)])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
