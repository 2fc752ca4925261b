"""What has to look like something does, or is told where it doesn't."""

import json

import pytest

import schema
from schema import Misfit, fields, flag, many, maybe, one_of, real, table, text, whole

ROW = fields({"file": text(), "count": whole(1, 9)}, {"note": maybe(text())})
SET = fields({"rows": many(ROW, 1, 3), "kind": one_of("a", "b")}, {"by": table(real(0, 1))})
GOOD = {"rows": [{"file": "x", "count": 1}], "kind": "a", "by": {"one": 0.5}, "later": [1]}


def test_what_fits_fits_and_what_is_not_named_may_be_there():
    schema.check(GOOD, SET)
    schema.check({**GOOD, "rows": [{"file": "", "count": 9, "note": None}] * 3}, SET)


BAD = [
    ([], "it is a list of 0, which is not a table"),
    ({}, "rows is missing"),
    ({**GOOD, "rows": {}}, "rows is a table of 0, which is not a list"),
    ({**GOOD, "rows": []}, "rows holds 0 values, which are not 1 to 3"),
    ({**GOOD, "rows": [GOOD["rows"][0], {"file": "x"}]}, r"rows[1].count is missing"),
    ({**GOOD, "rows": [{"file": 3, "count": 1}]}, "rows[0].file is 3, which is not a string"),
    ({**GOOD, "rows": [{"file": "x", "count": 10}]}, "is 10, which is not a whole number from 1"),
    ({**GOOD, "rows": [{"file": "x", "count": True}]}, "is true, which is not a whole number"),
    ({**GOOD, "rows": [{"file": "x", "count": 1.0}]}, "is 1.0, which is not a whole number"),
    ({**GOOD, "kind": "c"}, 'kind is "c", which is not one of "a", "b"'),
    ({**GOOD, "by": {"two": "1"}}, 'by.two is "1", which is not a number'),
    ({**GOOD, "by": {"two": 1.5}}, "by.two is 1.5, which is not from 0 to 1"),
    ({**GOOD, "by": {"two": float("nan")}}, "by.two is NaN, which is not a finite number"),
    ({**GOOD, "by": {"two": 10**400}}, "by.two is a number of many digits, which is not a finite"),
]


@pytest.mark.parametrize("value, reason", BAD, ids=[reason for _, reason in BAD])
def test_what_does_not_fit_is_told_with_its_place(value, reason):
    with pytest.raises(Misfit) as error:
        schema.check(value, SET)
    assert reason in str(error.value)


def test_flags_and_one_of_know_types():
    schema.check(True, flag)
    for value, shape in ((1, flag), (True, one_of(1)), (1.0, one_of(1))):
        with pytest.raises(Misfit):
            schema.check(value, shape)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("[" * 40 + "]" * 40, "nested deeper than 32"),
        ("[" * 900 + "]" * 900, "nested deeper than 32"),
        ("1" * 5000, "digit"),
        ("{", "line 1"),
        (b"\xff\xfe\xff", "can't decode"),
        (" " * (schema.LONGEST + 1), "67,108,864 would be read"),
    ],
    ids=["open brackets", "open braces", "41", "900", "a long number", "cut", "no text", "long"],
)
def test_a_text_that_is_too_much_is_no_json(text, reason):
    with pytest.raises(ValueError, match=reason):
        schema.parse(text)


def test_what_json_gives_is_what_is_read():
    assert schema.parse(json.dumps(GOOD)) == GOOD
    assert schema.parse("[" * 32 + "]" * 32) == json.loads("[" * 32 + "]" * 32)
    assert [schema.depth(value) for value in (1, [], {"a": [1, {}]})] == [0, 1, 3]
