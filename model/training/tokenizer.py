"""The embedded models' tokenizer: whole words where questions use them, single characters everywhere else.

Capitals and digits, the characters of answers, are always one token each. Two forms share the words: the one of the
DeepStack-L models, and Qwen's special tokens and turns. Knows nothing about models.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model.training import scenes, strings
from model.training.canvas import COLOURS, SHAPES

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<user>", "<answer>")
SPACE = "\u2581"  # stands for a space, as in sentencepiece
# user text is lower-cased: a question means the same in capitals; answers keep the case of the picture
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}{{ item['text'] }}{% endfor %}{% endif %}</s>"
    "{% else %}<user>"
    "{% if message['content'] is string %}{{ message['content'] | lower | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] | lower | trim }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
# the form of Qwen3-VL's own; a turn's images come before its words, as in training, and those are on one line
QWEN_TEMPLATE = """{%- macro words(content) -%}
    {%- if content is string -%}{{- content -}}{%- else -%}
        {%- for item in content -%}{%- if item.type == 'text' -%}{{- item.text -}}{%- endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is not string -%}
        {%- for item in message.content if item.type == 'image' -%}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
        {{- words(message.content) -}}
    {%- else -%}
        {{- words(message.content) | lower | replace('\\n', ' ') | trim -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Form:
    """What is around the words of a family of models: special tokens, template and its words, what is a space."""

    special: tuple[str, ...]
    pad: str
    bos: str | None
    eos: str
    template: str
    words: tuple[str, ...] = ()
    spaces: str = r"\s+"
    characters: tuple[str, ...] = ()


LLAVA = Form(SPECIAL, "<pad>", "<s>", "</s>", CHAT_TEMPLATE)
QWEN = Form(
    special=(
        "<|endoftext|>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    pad="<|endoftext|>",
    bos=None,
    eos="<|im_end|>",
    template=QWEN_TEMPLATE,
    words=("system", "user", "assistant"),
    spaces=r"[^\S\n]+",
    characters=("\n",),
)


def vocabulary(form: Form = LLAVA) -> list[str]:
    """All tokens in order: special ones, printable characters, the space, words at the start of a text and after a
    space.
    """
    words: set[str] = set(form.words)
    for wordings in scenes.WORDING.values():
        for wording in wordings:
            words.update(
                "".join(
                    c if c.islower() else " "
                    for c in wording.split("{")[0] + " ".join(part.split("}")[1] for part in wording.split("{")[1:])
                ).split()
            )
    for text in (
        *scenes.OUT_OF_SCOPE,
        *scenes.FILLER,
        scenes.NONE,
        scenes.UNKNOWN,
        "please text sign label field shapes bar chart eye notice corners card receipt table",
    ):
        words.update(text.rstrip("?").split())
    words.update(
        [
            *COLOURS,
            *SHAPES,
            *[s + "s" for s in SHAPES],
            *scenes.ORDINALS,
            "last",
            *scenes.SCENES,
            "top",
            "bottom",
            "left",
            "right",
            "middle",
            "center",
            "color",
            "labels",
        ]
    )
    words.update(w.lower() for w in strings.LEXICON)
    single = sorted(
        {part for word in words for part in word.split() if len(part) > 1 and part.isalpha() and part.islower()}
    )
    characters = [c for c in string.printable if not c.isspace()]
    return [
        *form.special,
        *form.characters,
        *characters,
        SPACE,
        *single,
        *[SPACE + c for c in string.ascii_lowercase],
        *[SPACE + w for w in single],
    ]


def make_tokenizer(form: Form = LLAVA) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template. A word that is not in the vocabulary is spelled with the longest pieces
    that are.
    """
    tokens = vocabulary(form)
    core = Tokenizer(
        models.WordPiece(
            {t: i for i, t in enumerate(tokens)},
            unk_token="<unk>",
            continuing_subword_prefix="",
            max_input_chars_per_word=200,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(form.spaces), SPACE)])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}?[a-z]+|."), behavior="isolated")
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=form.pad,
        unk_token="<unk>",
        bos_token=form.bos,
        eos_token=form.eos,
        additional_special_tokens=[t for t in form.special if t not in (form.pad, "<unk>", form.bos, form.eos)],
        chat_template=form.template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
