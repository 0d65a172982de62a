"""The weights of a FlowHead in autocast's dtype, cast once for many calls: autocast itself casts them in every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.torch_private import children_of, has_autocast, is_hooked, parameters_of, replica_of


def cast_once(
    head: nn.Module, trained: Sequence[Tensor], parameters: Sequence[Tensor], kind: str
) -> tuple[nn.Module, list[Tensor]] | None:
    """A copy of the head, for the calls of one step, and the leaves in it that stand for the trained parameters.

    Their gradients are those that autocast would cast back in every call. The head itself is left as it is, for other
    threads to call.

    Args:
        head: what is called under autocast.
        trained: its parameters that want a gradient.
        parameters: the values that they have here.
        kind: of device.

    Returns:
        None without autocast, and where modules other than those that a FlowHead is built of, hooks or shared
        parameters are to be found by it.
    """
    if not (type(head) is FlowHead and has_autocast(kind) and torch.is_autocast_enabled(kind)):
        return None
    if head.why_not_captured() is not None:
        return None
    modules = [module for _, module in head.named_modules(remove_duplicate=False)]
    own = [(module, name, p) for module in modules for name, p in parameters_of(module).items() if p is not None]
    if len({id(p) for *_, p in own}) < len(own) or any(map(is_hooked, modules)):
        return None
    dtype = torch.get_autocast_dtype(kind)
    given = dict(zip(map(id, trained), parameters, strict=True))
    replicas = {module: replica_of(module) for module in modules}
    for module, replica in replicas.items():
        for name, child in children_of(module).items():
            children_of(replica)[name] = child and replicas[child]
        vars(replica).update(dict.fromkeys(parameters_of(module)))
    stand_ins = {}
    for module, name, p in own:
        tensor = given.get(id(p), p).detach()
        if type(module) is nn.Linear and tensor.dtype == torch.float32:  # autocast leaves norms alone
            tensor = tensor.to(dtype)
        stand_ins[id(p)] = vars(replicas[module])[name] = tensor.requires_grad_(id(p) in given)
    return replicas[head], [stand_ins[place] for place in given]
