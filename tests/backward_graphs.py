"""A backend of `torch.compile` that shows what its compiler would be given: inductor's graphs, without its generated code.

It traces, differentiates, runs inductor's passes over the joint graph and partitions it like the real one, then runs both graphs
as they are, on any device and in seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes


class GraphRecorder:
    """Give it to `torch.compile` as `backend`.

    Args:
        joint_pass: a pass over the joint graph, as of `joint_custom_pre_pass`.

    Attributes:
        forward: the graphs of forward, in the order in which they were compiled.
        backward: those of backward.
    """

    def __init__(self, joint_pass: Any = None):
        self.forward: list[fx.GraphModule] = []
        self.backward: list[fx.GraphModule] = []
        self._joint_pass = joint_pass
        self._compile = aot_autograd(
            fw_compiler=self._keeping(self.forward),
            bw_compiler=self._keeping(self.backward),
            partition_fn=self._partition,
            decompositions=select_decomp_table,
        )

    def __call__(self, graph: fx.GraphModule, inputs: list[torch.Tensor], **kwargs: Any) -> Any:
        return self._compile(graph, inputs, **kwargs)

    def _partition(self, joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        with config.patch(joint_custom_pre_pass=self._joint_pass):
            joint_graph_passes(joint)
        joint.graph.lint()
        return min_cut_rematerialization_partition(joint, inputs, compiler="inductor", **kwargs)

    @staticmethod
    def _keeping(graphs: list[fx.GraphModule]) -> Any:
        def compiler(graph: fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)

            def run(args: list[Any]) -> Any:
                arguments = list(args)
                args.clear()
                return graph(*arguments)

            run._boxed_call = True
            return run

        return compiler


def calls(graph: fx.GraphModule, operator: Any) -> list[fx.Node]:
    """The calls of one operator (an `OpOverload` or a function) in a graph."""
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is operator]
