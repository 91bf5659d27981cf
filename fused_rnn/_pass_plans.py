"""The answers of the compiled planners, one pass over one layer, as the dataclasses that explain returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_rnn.explanation import Candidate, Kernel, PassPlan, Rejection, Shares


def pass_on_cpu(plan: Mapping[str, Any]) -> PassPlan:
    """plan: the extension's cpu_plan."""
    threads, weights = plan["threads"], plan["weights"]
    shares = Shares(plan["direction_teams"], plan["batch_teams"], plan["split"])
    divided = (
        f"{shares.directions} of directions x {shares.batch_rows} of batch rows x {shares.hidden_units} of hidden units"
    )
    text = f"{threads} thread{'s' * (threads > 1)}: {divided}; W_hh {weights}"
    return PassPlan(threads=threads, shares=shares, weights=weights, text=text)


def pass_on_cuda(plan: Mapping[str, Any], sizes: Mapping[str, int], backward: bool) -> PassPlan:
    """plan: the extension's plan, of a layer of these sizes."""
    kernels = tuple(_kernel(kernel, sizes, backward) for kernel in plan["kernels"])
    held = plan.get("persistent")
    if held is not None:
        kernels += (_persistent_kernel(plan["family"], held),)
    first, *rest = plan["text"].rstrip("\n").split("\n")
    if kernels:  # cuDNN's are not known
        first += f", {max(kernel.blocks for kernel in kernels)} blocks at most in a launch"
    lines = [first, *rest]
    if held is not None:
        lines.append(f"  {kernels[-1].weight_registers} registers of each thread hold weights")
    return PassPlan(
        family=plan["family"],
        reason=plan["reason"],
        rejected=tuple(Rejection(family, reason) for family, reason in plan["rejected"].items()),
        candidates=tuple(Candidate(name, one["us"], one["us_per_step"]) for name, one in plan["candidates"].items()),
        cheapest=plan["cheapest"],
        kernels=kernels,
        launches=sum(kernel.launches for kernel in kernels) + sizes["T"] * plan["products"] if kernels else None,
        overlapped_launches=plan["overlapped_launches"],
        workspace_bytes=plan["workspace_bytes"],
        us=plan["us"],
        us_per_step=plan["us_per_step"],
        text="\n".join(lines),
    )


def _kernel(kernel: Mapping[str, Any], sizes: Mapping[str, int], backward: bool) -> Kernel:
    """A kernel that is launched once a step, or for the gradient of h0 alone."""
    launches = sizes["T"]
    if kernel["name"] == "state_grad":  # of every step with a projection, and of h0
        launches = sizes["T"] + 1 if sizes["P"] != sizes["H"] else 1
    return Kernel(
        name=kernel["name"], persistent=False, math=kernel["math"], grid=kernel["grid"], threads=kernel["threads"],
        units=kernel["units"], rows=kernel["batch"], launches=launches, stages=kernel["stages"],
        smem_bytes=kernel["smem_bytes"],
        weight_registers=0, weight_bytes_in_registers=0, weight_bytes_in_smem=0, us=kernel["us"],
    )  # fmt: skip


def _persistent_kernel(family: str, held: Mapping[str, Any]) -> Kernel:
    """The kernel that holds the weights of a layer over all its steps."""
    return Kernel(
        name=family, persistent=True, math=held["math"], grid=(held["blocks"], held["groups"], held["directions"]),
        threads=held["threads"], units=held["units"], rows=held["rows"], launches=held["launches"],
        stages=None, smem_bytes=held["smem_bytes"], weight_registers=held["weight_registers"],
        weight_bytes_in_registers=held["weight_bytes_in_registers"], weight_bytes_in_smem=held["weight_bytes_in_smem"],
        us=None,
    )  # fmt: skip
