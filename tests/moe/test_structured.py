"""Answers of a given form: always valid, whatever the model wants to say, and nobody else's tokens change."""

import json
import re

import jsonschema
import pytest
import torch

from moe import GuidedDecodingParams
from moe.engine.grammar import Grammars
from moe.engine.sampling import Sampler, choose
from moe.llm import LLM
from moe.params import SamplingParams, StructuredOutputsParams
from tests.moe.moe_cases import TINYMOE, check_whole, config

PROMPT = "Once upon a time, there was"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "blue"]},
        "friends": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/friend"}},
    },
    "required": ["name", "age", "colour", "friends"],
    "additionalProperties": False,
    "$defs": {
        "friend": {
            "type": "object",
            "properties": {"kind": {"anyOf": [{"const": "cat"}, {"type": "null"}]}},
            "required": ["kind"],
            "additionalProperties": False,
        }
    },
}
FORMS = {
    "json": StructuredOutputsParams(json=SCHEMA),
    "regex": StructuredOutputsParams(regex=r"[A-Z][a-z]{2,9} (is|was) [0-9]{1,3}"),
    "choice": StructuredOutputsParams(choice=["yes", "no, never", '"perhaps"', "häufig"]),
    "lark": StructuredOutputsParams(grammar='start: "a" (" b" | " c"){1,4}'),
    "gbnf": StructuredOutputsParams(grammar='root ::= "a" (" b" | " c" root)'),
}


@pytest.fixture(scope="module")
def llm():
    with LLM(TINYMOE, config("0.5", max_tokens=64, max_sequences=8)) as llm:
        yield llm
        check_whole(llm)


def check_form(name, text):
    if name == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
    elif name == "regex":
        assert re.fullmatch(FORMS["regex"].regex, text)
    elif name == "choice":
        assert text in FORMS["choice"].choice
    else:
        assert re.fullmatch({"lark": "a( b| c){1,4}", "gbnf": "(a c)*a b"}[name], text)


@pytest.mark.parametrize("name", FORMS)
def test_every_sample_has_the_form(llm, name):
    params = SamplingParams(max_tokens=None, temperature=1.0, n=6, seed=5, structured_outputs=FORMS[name])
    answers = llm.generate(PROMPT, params)[0].outputs
    for answer in answers:
        assert answer.finish_reason == "stop", answer
        check_form(name, answer.text)
    assert len({a.text for a in answers}) > 1


def test_a_json_object_is_one_unless_it_is_cut_off(llm):
    params = SamplingParams(
        max_tokens=300, temperature=1.0, n=8, seed=1, structured_outputs=StructuredOutputsParams(json_object=True)
    )
    for answer in llm.generate(PROMPT, params)[0].outputs:
        assert answer.text.lstrip().startswith("{")
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.text), dict)


def test_others_of_the_batch_change_nothing_and_are_not_changed(llm):
    def params(name, seed):
        form = FORMS.get(name)
        return SamplingParams(max_tokens=24, temperature=1.0, seed=seed, logprobs=0, structured_outputs=form)

    asked = [(name, seed) for seed in (1, 2) for name in (*FORMS, "free")]
    together = llm.generate([PROMPT] * len(asked), [params(*one) for one in asked])
    for one, answer in zip(asked, together):
        alone = llm.generate(PROMPT, params(*one))[0].outputs[0]
        assert (alone.token_ids, alone.text) == (answer.outputs[0].token_ids, answer.outputs[0].text)


def test_a_stream_says_the_same(llm):
    params = SamplingParams(max_tokens=None, temperature=1.0, seed=3, structured_outputs=FORMS["json"])
    whole = llm.generate(PROMPT, params)[0].outputs[0].text
    assert "".join(llm.stream(PROMPT, params)) == whole


def test_a_form_that_binds_nothing_changes_nothing(llm):
    free = SamplingParams(max_tokens=20, temperature=1.0, seed=4, top_k=7)
    anything = SamplingParams(
        max_tokens=20, temperature=1.0, seed=4, top_k=7, structured_outputs=StructuredOutputsParams(regex=r"(?s:.*)")
    )
    assert llm.generate(PROMPT, free)[0].outputs[0].token_ids == llm.generate(PROMPT, anything)[0].outputs[0].token_ids


def test_the_mask_is_what_the_parser_takes_token_by_token(llm):
    """Against a slow twin: every token tried on a copy of the state."""
    grammars = Grammars(TINYMOE, 2048, [0], False)
    form, output = grammars.of(FORMS["json"]), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        allowed = form.allowed(output)
        some = torch.randperm(2048, generator=generator)[:100].tolist() + allowed.nonzero()[:20, 0].tolist()
        for token in some:
            one = grammars._matcher(FORMS["json"]).deep_copy()
            assert allowed[token] == (one.consume_tokens([*output, token]) and not one.is_error())
        output = [*output, int(torch.multinomial(allowed.float(), 1, generator=generator))]


@pytest.mark.parametrize(
    "form",
    [{"regex": r"a?<\|doc\|>b"}, {"choice": ["<|doc|>", "<|doc|>b"]}, {"json": {"const": "<|doc|>"}}],
    ids=["regex", "choice", "json"],
)
def test_the_text_of_a_special_token_is_spelled(llm, form):
    """It was the token itself, which has no text."""
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=8, structured_outputs=StructuredOutputsParams(**form))
    answer = llm.generate(PROMPT, params)[0].outputs[0]
    assert answer.finish_reason == "stop"
    assert re.fullmatch(r'a?<\|doc\|>b?|"<\|doc\|>"', answer.text), answer
    assert answer.token_ids == llm.generate(PROMPT, params)[0].outputs[0].token_ids


def test_a_grammar_may_name_a_special_token(llm):
    form = StructuredOutputsParams(grammar='start: "a" <|doc|> "b"')
    allowed = Grammars(TINYMOE, 2048, [0], False).of(form).allowed(llm.encode("a"))
    assert allowed.nonzero()[:, 0].tolist() == [0]


def test_a_replay_goes_on_as_it_would_have(llm):
    """What a request said elsewhere is read before its next token: ranks may be lost."""
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=8, structured_outputs=FORMS["json"])
    whole = llm.generate(PROMPT, params)[0].outputs[0].token_ids
    prompt = llm.encode(PROMPT)
    request = llm.engine.add_request([*prompt, *whole[:9]], params, len(prompt))
    while request.finish_reason is None:
        llm.engine.step()
    assert request.tokens[len(prompt) :] == whole


def test_ends_and_limits(llm):
    """ignore_eos and min_tokens cannot make an answer longer than its form."""
    params = SamplingParams(
        temperature=1.0, seed=1, n=4, ignore_eos=True, min_tokens=30, structured_outputs=FORMS["choice"]
    )
    assert {a.finish_reason for a in llm.generate(PROMPT, params)[0].outputs} == {"stop"}
    optional = SamplingParams(
        max_tokens=None,
        temperature=1.0,
        seed=1,
        n=8,
        ignore_eos=True,
        structured_outputs=StructuredOutputsParams(regex="(ab){0,5}"),
    )
    assert {re.fullmatch("(ab){0,5}", a.text) is None for a in llm.generate(PROMPT, optional)[0].outputs} == {False}
    sampler = Sampler(SamplingParams(allowed_token_ids=[5]), 0, Grammars(TINYMOE, 2048, [0], False).of(FORMS["regex"]))
    (choice,) = choose(torch.zeros(1, 2048), [(sampler, [])])
    assert "structured_outputs and min_tokens leave no token" in choice.error


def test_a_form_is_compiled_once_and_seldom_used_ones_are_dropped():
    grammars = Grammars(TINYMOE, 2048, [0], False)
    first = grammars._matcher(FORMS["regex"])
    assert grammars._matcher(StructuredOutputsParams(regex=FORMS["regex"].regex)) is first
    for n in range(63):
        grammars.check(StructuredOutputsParams(regex=f"a{{{n + 1}}}"))
    assert grammars._matcher(FORMS["regex"]) is first
    for n in range(64):
        grammars.check(StructuredOutputsParams(regex=f"b{{{n + 1}}}"))
    assert grammars._matcher(FORMS["regex"]) is not first


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ({"json": {"type": "object", "not": {}}}, r"structured_outputs.json is not supported: .*not"),
        ({"json": "{"}, r"structured_outputs.json"),
        ({"json": {"$ref": "http://example.org/x"}}, "structured_outputs.json is not supported"),
        ({"regex": "(a"}, "structured_outputs.regex is not supported: .*unclosed"),
        ({"grammar": "start: nobody"}, "structured_outputs.grammar is not supported"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex is not supported"),
        ({"regex": r"[^\s\S]"}, "structured_outputs.regex: no token of the vocabulary can follow: no answer has"),
        ({"grammar": "root ::= root"}, "structured_outputs.grammar: no token of the vocabulary can follow"),
    ],
)
def test_forms_that_cannot_be_asked_for(llm, form, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        llm.generate(PROMPT, SamplingParams(structured_outputs=StructuredOutputsParams(**form)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("choice", [" a\n\t\x00", "\\/#&~-", "a|(b)[c]{2}.*^$", "häufig 😀", "'\"<x>@%\u2028"])
def test_a_choice_is_taken_character_for_character(llm, choice):
    form = StructuredOutputsParams(choice=[choice])
    (answer,) = llm.generate(PROMPT, SamplingParams(max_tokens=None, structured_outputs=form))[0].outputs
    assert (answer.text, answer.finish_reason) == (choice, "stop")


def test_thousands_of_choices(llm):
    choices = [f"label {n}" for n in range(3000)]
    params = SamplingParams(max_tokens=None, structured_outputs=StructuredOutputsParams(choice=choices))
    assert llm.generate(PROMPT, params)[0].outputs[0].text in choices


def test_a_form_that_comes_to_a_dead_end_ends_its_own_request(llm):
    never = SamplingParams(structured_outputs=StructuredOutputsParams(grammar='start: "a" no\nno: /[^\\s\\S]/'))
    bad, good = (o.outputs[0] for o in llm.generate([PROMPT] * 2, [never, SamplingParams(max_tokens=5)]))
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert bad.error == "structured_outputs: no token of the vocabulary can follow: no answer has this form"


LONG = "abcdefgh" * 2000


@pytest.mark.parametrize(
    "form",
    [
        {"choice": ["a", LONG]},
        {"regex": f"a|{LONG}"},
        {"grammar": f'start: "{LONG}"'},
        {"json": {"properties": {"a": {"enum": [1, LONG]}}}},
        {"json": {"properties": {LONG: {}}}},
    ],
    ids=["choice", "regex", "grammar", "value", "name"],
)
def test_what_a_form_spells_out_is_bounded(llm, form):
    """The lexer's states are as long as what is left of a word, and every step would wait for that."""
    with pytest.raises(ValueError, match=r"spells out 1600\d characters in a row, at most 10000"):
        llm.check_request([1], SamplingParams(structured_outputs=StructuredOutputsParams(**form)))
    told = {"type": "object", "description": LONG, "properties": {"a": {"title": LONG, "type": "integer"}}}
    llm.check_request([1], SamplingParams(structured_outputs=StructuredOutputsParams(json=told)))


def test_names_of_offline_scripts():
    form = GuidedDecodingParams(choice=["a", "b"])
    assert SamplingParams(guided_decoding=form).structured_outputs == form == StructuredOutputsParams(choice=("a", "b"))
    assert SamplingParams(structured_outputs={"regex": "a"}).sample(0).structured_outputs.regex == "a"
    for wrong in ({}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": "ab"}, {"regex": 5}):
        with pytest.raises(ValueError, match="structured_outputs"):
            StructuredOutputsParams(**wrong)
    with pytest.raises(ValueError, match="must be an object with one of"):
        SamplingParams(structured_outputs={"structural_tag": "x"})
