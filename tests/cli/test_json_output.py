"""What every --json has in common."""

import json

import pytest

from cptool.cli.json_output import line, print_object


def test_an_object_is_one_line_that_begins_with_its_schema(capsys):
    print_object({"tokens": 3, "text": ["é\n"], "nested": {"pairs": ((1, 2), [])}})
    printed, errors = capsys.readouterr()
    assert printed.startswith('{"schema": 1, ') and printed.count("\n") == 1 and errors == ""
    read = json.loads(printed)
    assert list(read) == ["schema", "tokens", "text", "nested"]
    assert read["text"] == ["é\n"] and read["nested"] == {"pairs": [[1, 2], []]}


def test_what_json_lacks_is_null():
    infinite, nan = float("inf"), float("nan")
    assert json.loads(line({"a": [-infinite, 0.5], "b": {"c": nan}})) == {
        "schema": 1,
        "a": [None, 0.5],
        "b": {"c": None},
    }


def test_no_field_takes_the_place_of_the_schema():
    with pytest.raises(ValueError, match='"schema" is the version'):
        line({"schema": 2})
