"""The process that compares expressions: run as a script by `mpo.verification.expressions`, it imports nothing of `mpo`.

It reads lines `[answer, ground truth]` in JSON and writes lines `[equal, value of the answer, value of the ground truth]`. A
request that takes more than its CPU time ends the process: the kernel does it, so that no long computation in C can delay it.
"""

import json
import logging
import signal
import sys
from typing import Any

MEMORY_BYTES = 2 * 2**30


def main() -> None:
    """Answer requests until the input ends."""
    seconds = float(sys.argv[1])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):  # not on this system, or a lower limit stands
        pass
    output = sys.stdout
    sys.stdout = sys.stderr
    try:
        import math_verify
    except ImportError:
        print("missing", file=output, flush=True)
        return
    logging.disable(logging.CRITICAL)
    math_verify.parse("$1$", parsing_timeout=None)
    print("ready", file=output, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its default action is to end the process
        try:
            result = compare(*json.loads(line))
        except MemoryError:
            return
        except Exception:  # whatever the parser cannot read is not equal
            result = (False, None, None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(result), file=output, flush=True)


def compare(answer: str, truth: str) -> tuple[bool, float | None, float | None]:
    """Whether two expressions in LaTeX are equal, and their values where they are numbers."""
    from math_verify import LatexExtractionConfig, parse, verify

    given, known = (
        parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=False) for text in (answer, truth)
    )
    if not given or not known:
        return False, None, None
    return bool(verify(known, given, timeout_seconds=None, raise_on_error=False)), value(given[0]), value(known[0])


def value(expression: Any) -> float | None:
    """The value of a sympy expression; None where it is no real number."""
    import sympy

    if not isinstance(expression, sympy.Expr):
        return None
    expression = expression.subs(
        {symbol: sympy.E if symbol.name == "e" else sympy.I for symbol in expression.free_symbols if symbol.name in "ei"}
    )
    if expression.free_symbols:
        return None
    number = complex(expression.evalf(15))
    return number.real if abs(number.imag) < 1e-12 and abs(number.real) < 1e300 else None


if __name__ == "__main__":
    main()
