"""How functions are compiled that kernels are made of.

`inner` and `inlined` ones are called by kernels alone: they have no ways in from Python and from C, each of which would hold all of the
function once more; `inlined` ones are put into their callers. Numba would make machine code of each alone, and optimize what it calls
once more for each of its callers, and for theirs. Here they are translated, and no more: LLVM sees them when a kernel is whole, once.

What a kernel does with a read, `op`, is a number that goes down through many of them, and each asks `if op == ...`. Numba would type and
translate both branches of such a question, before LLVM leaves one out; that was half of the time of a compilation. So where the caller
knows a number, it is put in the argument's place before, and the branch that is not taken goes at once.
"""

import gc

from numba import _dynfunc, njit, types
from numba.core import event, ir
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NativeLowering
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


class _Part(JITCodeLibrary):
    """The code of a function that only others are made of."""

    def _optimize_final_module(self):
        """Its callers are, with it."""

    def _finalize_final_module(self):
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LoweredAsPart(NativeLowering):
    """What Numba does with a function whose types are known, but for its machine code."""

    _name = "lowered_as_part"

    def run_pass(self, state):
        state.library, state.flags.no_compile = _Part(state.targetctx.codegen(), state.func_id.func_qualname), True
        super().run_pass(state)
        lowered = state.cr
        # as without a wrapper for Python: a function of Python's that cannot be called
        none = _dynfunc.make_function(lowered.fndesc.lookup_module(), state.func_id.func_name, "", 0, lowered.env, (state.library,))
        state.targetctx.insert_user_function(none, lowered.fndesc, [state.library])
        state.cr = lowered._replace(cfunc=none)
        return True


class _Compiler(CompilerBase):
    def define_pipelines(self):
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_KnownNumbers, FixupArgs)
        passes.passes = [(_LoweredAsPart if one is NativeLowering else one, text) for one, text in passes.passes]
        passes.finalize()
        return [passes]


class _NoGarbage(event.Listener):
    """Python looks for no garbage while Numba compiles, which makes millions of objects and drops few: a fifth of the time."""

    def __init__(self):
        self._was_on = []

    def on_start(self, _):
        self._was_on.append(gc.isenabled())
        gc.disable()

    def on_end(self, _):
        if self._was_on.pop():
            gc.enable()


_options = {"pipeline_class": _Compiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner, inlined = njit(**_options), njit(forceinline=True, **_options)
event.register("numba:compile", _NoGarbage())
