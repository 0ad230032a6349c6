"""What `--draft` takes, in one line where it cannot be."""

import pytest

from cptool.engine.drafts.names import check_draft, layers_of
from cptool.errors import OptionError


@pytest.mark.parametrize("draft", ["off", "lookup", "auto", "layers:1", "layers:29"])
def test_what_can_be(draft):
    check_draft(draft, 30)


@pytest.mark.parametrize(
    "draft", ["layers:0", "layers:30", "layers:", "layers:-1", "layers:2.5", "layers:²"]
)
def test_layers_are_some_of_the_model_s(draft):
    with pytest.raises(OptionError, match="less than the 30 layers of the model") as error:
        check_draft(draft, 30)
    assert "\n" not in str(error.value)


def test_the_number_of_layers():
    assert layers_of("layers:12") == 12
    assert layers_of("lookup") is None
