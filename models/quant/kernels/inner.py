"""How functions are compiled that kernels are made of.

`inner` and `inlined` ones are called by kernels alone: they have no ways in from Python and from C, each of which would hold all of the
function once more; `inlined` ones are put into their callers.

What a kernel does with a read, `op`, is a number that goes down through many of them, and each asks `if op == ...`. Numba would type and
translate both branches of such a question, before LLVM leaves one out; that was half of the time of a compilation. So where the caller
knows a number, it is put in the argument's place before, and the branch that is not taken goes at once.
"""

from numba import njit, types
from numba.core import ir
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.untyped_passes import FixupArgs


@register_pass(mutates_CFG=False, analysis_only=False)
class _KnownNumbers(FunctionPass):
    """Arguments of types that are one number become that number."""

    _name = "known_numbers"

    def __init__(self):
        super().__init__()

    def run_pass(self, state):
        found = False
        for block in state.func_ir.blocks.values():
            for assign in block.find_insts(ir.Assign):
                kind = isinstance(assign.value, ir.Arg) and state.args[assign.value.index]
                if isinstance(kind, types.IntegerLiteral):
                    assign.value = ir.Const(kind.literal_value, assign.value.loc)
                    state.func_ir._definitions[assign.target.name] = [assign.value]
                    found = True
        return found


class _Compiler(CompilerBase):
    def define_pipelines(self):
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_KnownNumbers, FixupArgs)
        passes.finalize()
        return [passes]


_options = {"pipeline_class": _Compiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner, inlined = njit(**_options), njit(forceinline=True, **_options)
