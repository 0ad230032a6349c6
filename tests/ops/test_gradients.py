"""The ops have no backward, so they raise where autograd would lose a gradient in silence."""

import pytest
import torch
from reference import make_case

from cptool import attention_partial, merge_partials
from cptool.errors import UserError

CASE = make_case([(range(5), range(9))])
PARTIAL = attention_partial(*CASE.arguments)


def given(index):
    arguments = list(CASE.arguments)
    arguments[index] = arguments[index].clone().requires_grad_()
    return arguments


def running(index):
    into = [tensor.clone() for tensor in PARTIAL]
    into[index].requires_grad_()
    return tuple(into)


CALLS = {
    "q": lambda: attention_partial(*given(0)),
    "k": lambda: attention_partial(*given(1)),
    "v": lambda: attention_partial(*given(2)),
    "into's out": lambda: attention_partial(*CASE.arguments, into=running(0)),
    "into's lse": lambda: attention_partial(*CASE.arguments, into=running(1)),
    "outs[1]": lambda: merge_partials([PARTIAL[0], running(0)[0]], [PARTIAL[1]] * 2),
    "lses[0]": lambda: merge_partials([PARTIAL[0]] * 2, [running(1)[1], PARTIAL[1]]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_gradient_is_never_lost_in_silence(name):
    with pytest.raises(UserError) as told:
        CALLS[name]()
    line = str(told.value)
    assert line.startswith(f"{name} requires a gradient, and ") and "torch.no_grad()" in line
    assert "\n" not in line
    with torch.no_grad():
        CALLS[name]()  # `into` is merged into in place, and stays the leaf that it is


def test_inference_mode_and_detached_tensors_are_taken():
    q, k, v = (x.clone().requires_grad_() for x in CASE.arguments[:3])
    rest = CASE.arguments[3:]
    with torch.inference_mode():
        out, _ = attention_partial(q, k, v, *rest)
    assert torch.equal(out, PARTIAL[0])
    assert torch.equal(attention_partial(q.detach(), k.detach(), v.detach(), *rest)[0], PARTIAL[0])


class Attention(torch.autograd.Function):
    """Somebody's own backward, for which the forward runs without autograd."""

    @staticmethod
    def forward(context, q):
        return attention_partial(q, *CASE.arguments[1:])[0]

    @staticmethod
    def backward(context, grad):
        return grad


def test_a_function_with_a_backward_of_its_own_may_use_the_op():
    q = CASE.q.clone().requires_grad_()
    Attention.apply(q).sum().backward()
    assert torch.equal(q.grad, torch.ones_like(q))


def test_compiled_code_raises_too():
    compiled = torch.compile(attention_partial, backend="eager")
    assert torch.equal(compiled(*CASE.arguments)[0], PARTIAL[0])
    with pytest.raises(Exception, match="requires a gradient"):
        compiled(*given(0))
