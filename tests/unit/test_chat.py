"""Chat templates: the ids that run are the template's, and everyone says that one was applied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import scripted, texts_of, tiny_model, words_tokenizer

import probekit as pk
from probekit.backends.transformers import TransformersModel
from probekit.backends.transformers.tokens import tokenize
from probekit.batches import make_batch
from probekit.cli import cli
from probekit.core import CapabilityError, InputError, TextError
from probekit.texts import read_texts

# <s>, then per message w10 (user), w11 (assistant) or w12 (system), its words and </s>; w11 opens the answer.
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{{ ' ' + {'user': 'w10', 'assistant': 'w11', 'system': 'w12'}[m.role] + ' ' + m.content + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' w11' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}w5"


def chatty(template: str | None = TEMPLATE, *, adds_bos: bool = False) -> Any:
    """The tests' tokenizer with a template; one that also adds <s> to plain texts by itself."""
    from tokenizers import processors

    tokenizer = words_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return tokenizer


def model(template: str | None = TEMPLATE) -> TransformersModel:
    return TransformersModel.from_loaded(tiny_model("llama").module, chatty(template), name="tiny-talker")


MESSAGES = [
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6"},
    {"role": "user", "content": "w7"},
]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("text", "chat", "ids"),
    [
        ("w5 w6", True, (1, 10, 5, 6, 2, 11)),
        ("w5 w6", "w7 w8", (1, 12, 7, 8, 2, 10, 5, 6, 2, 11)),
        (MESSAGES, True, (1, 10, 5, 2, 11, 6, 2, 10, 7, 2, 11)),
        (json.dumps(MESSAGES), True, (1, 10, 5, 2, 11, 6, 2, 10, 7, 2, 11)),
        (MESSAGES[:2], True, (1, 10, 5, 2, 11, 6, 2)),  # the model has answered: nothing opens another answer
        ([{"role": "system", "content": "w9"}, *MESSAGES[:1]], "w7", (1, 12, 9, 2, 10, 5, 2, 11)),
    ],
)
def test_ids_are_the_templates(text: Any, chat: Any, ids: tuple[int, ...], adds_bos: bool) -> None:
    """Counted out by hand; the beginning-of-sequence token is there once, whatever the tokenizer adds by itself."""
    for bos in ("model", "always"):
        batch = tokenize(chatty(adds_bos=adds_bos), [text], bos, chat)  # type: ignore[arg-type]
        assert batch.texts[0].ids == ids
        assert batch.begins == "'<s>' (id 1) in front of every text"
        assert batch.template.startswith("the tokenizer's own (sha256:")
        assert ("system message 'w7" in batch.template) == isinstance(chat, str)


def test_a_missing_first_token_is_added_on_request_only() -> None:
    bare = chatty(TEMPLATE.replace("<s>", ""), adds_bos=True)
    assert tokenize(bare, ["w5"], "model", True).texts[0].ids == (10, 5, 2, 11)
    assert tokenize(bare, ["w5"], "never", True).texts[0].ids == (10, 5, 2, 11)
    assert tokenize(bare, ["w5"], "always", True).texts[0].ids == (1, 10, 5, 2, 11)
    with pytest.raises(InputError, match="template begins with '<s>', which bos='never' excludes"):
        tokenize(chatty(), ["w5"], "never", True)


@pytest.mark.parametrize(
    ("template", "texts", "chat", "error", "message"),
    [
        (None, ["w5"], True, InputError, "no chat template"),
        (NO_SYSTEM, ["w5"], "w6", InputError, "refuses text 0: System role not supported"),
        (TEMPLATE, [[{"role": "tool", "content": "w5"}]], True, InputError, "refuses text 0"),
        (TEMPLATE, ["w5", '[{"role": "user"}]'], True, InputError, "Message 0 of text 1"),
        (TEMPLATE, [["w5"]], True, InputError, "Message 0 of text 0 is 'w5'"),
        (TEMPLATE, ["w5", " "], True, TextError, "Text 1 is empty"),
        (TEMPLATE, [[{"role": "user", "content": " "}]], True, TextError, "without any words"),
        (TEMPLATE, [[]], True, TextError, "without any words"),
        (TEMPLATE, [7], True, TextError, "a string or a list of messages, found int"),
        (TEMPLATE, ["w5"], "", InputError, "words of a system message, found ''"),
        (TEMPLATE, ["w5"], 1, InputError, "found 1"),
    ],
)
def test_chats_that_cannot_be_are_refused(
    template: str | None, texts: Any, chat: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tokenize(chatty(template), texts, "model", chat)


def test_text_that_only_looks_like_json_is_a_text() -> None:
    for text in ("[w5 w6", "[1, 2]", "[]"):
        n_words = len(text.split())
        assert len(tokenize(chatty(), [text], "model", True).texts[0]) == n_words + 4


def test_models_without_a_tokenizer_and_texts_without_words_are_refused() -> None:
    with pytest.raises(CapabilityError, match="has no chat template"):
        make_batch(scripted(), (), ["w5"], "model", None, True)
    with pytest.raises(InputError, match="tokenised already"):
        make_batch(model(), (), texts_of([4]), "model", None, True)


def test_results_and_plans_and_generation_say_that_a_template_was_applied() -> None:
    opened = model()
    result = pk.run("token-uncertainty", opened, ["w5 w6 w7", "w8"], chat="w9", progress=False)
    assert result.dataset["token_id"].values[:9].tolist() == [1, 12, 9, 2, 10, 5, 6, 7, 2]
    corpus = result.provenance["texts"]
    assert corpus["beginning_of_sequence"] == "'<s>' (id 1) in front of every text"
    assert corpus["chat_template"].endswith("system message 'w9'")
    assert "2 texts in the chat template" in result.about
    plain = pk.run("token-uncertainty", opened, ["w5 w6 w7"], progress=False)
    assert "chat_template" not in plain.provenance["texts"] and "chat" not in plain.about
    assert plain.provenance["texts"]["beginning_of_sequence"].endswith("exists, and was not added")
    assert pk.plan("token-uncertainty", opened, MESSAGES, chat=True)[0].n_tokens == 11  # one chat of three messages
    assert pk.generate(opened, "w5", 2, chat=True).batch.texts[0].ids[:5] == (1, 10, 5, 2, 11)


def test_windows_and_choices_of_a_batch_remember_the_template() -> None:
    batch = tokenize(chatty(), ["w5 w6 w7 w8", "w5"], "model", True)
    for part in (batch.windows(3), batch.select([1])):
        assert (part.begins, part.template) == (batch.begins, batch.template) != ("", "")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat-model")
    tiny_model("llama").module.save_pretrained(folder)
    chatty().save_pretrained(folder)
    return folder


def test_the_command_line_shows_the_exact_ids(chat_folder: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": MESSAGES}) + "\n", encoding="utf-8")
    common = ["run", "token-uncertainty", "--model", str(chat_folder), "--texts", str(chats)]
    result = CliRunner().invoke(cli, [*common, "--text", "w5 w6", "--system", "w9", "--plan"])
    assert result.exit_code == 0, result.output
    for line in (
        "begins    '<s>' (id 1) in front of every text",
        "chat      the tokenizer's own (sha256:",
        "text 0    1 '<s>'  12 'w12'  9 'w9'  2 '</s>'  10 'w10'  5 'w5'  6 'w6'  2 '</s>'  11 'w11'",
        "text 1    1 '<s>'  12 'w12'  9 'w9'  2 '</s>'  10 'w10'  5 'w5'  2 '</s>'  11 'w11'  6 'w6'",
    ):
        assert line in result.output, result.output
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, [*common, "--chat", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "chat      the tokenizer's own" in result.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "chat template" in page and "beginning of sequence" in page
    result = CliRunner().invoke(cli, [*common, "--out", str(out)])
    assert result.exit_code == 2 and "found 'messages' in place of 'text'" in result.output


def test_messages_in_a_file_need_a_chat(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES}) + '\n{"text": "w5"}\n', encoding="utf-8")
    assert [json.loads(t) if t.startswith("[") else t for t in read_texts(path, chats=True)] == [MESSAGES, "w5"]
    with pytest.raises(InputError, match="line 1: found 'messages'"):
        read_texts(path)


@pytest.mark.real
def test_smollm2_reads_what_its_tokenizer_renders() -> None:
    """Ids equal to `apply_chat_template`, with its own system message and with a given one; <|im_start|> once."""
    smol: Any = pk.open_model("smollm2-135m-instruct", lazy=True)
    asked = "What is the capital of France?"
    for chat, messages in (
        (True, [{"role": "user", "content": asked}]),
        ("Answer briefly.", [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": asked}]),
    ):
        expected = smol.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        batch = smol.tokenize([asked], "model", chat)
        assert list(batch.texts[0].ids) == list(expected)
        assert batch.strings[0] == "<|im_start|>" and batch.begins.endswith("in front of every text")
        assert "".join(batch.strings).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert smol.decode([49152, 0]) == ("<unused 49152>", "<|endoftext|>")
