"""Make pairs for a kind of question of your own, here points in an image, which are right within a number of pixels.

    python examples/custom_matcher.py make mmpr.yaml --output mmpr    # the words of mpo mmpr, which it runs with one more kind

A line of the questions: {"image": "a.png", "question": "Where is the cat's eye? Answer as (x, y).", "answer": "(40, 25)",
"kind": "point", "tolerance": 8}; or in mmpr.yaml, for all of them: verify: {kind: point, tolerance: 8}
"""

import math
import re
import sys

from mpo.commands import main
from mpo.verification import register


def read_point(text):
    """The two numbers of a text; None for another count of them."""
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    return numbers if len(numbers) == 2 else None


def same_point(answer, truth, rules):
    """Whether the answer is near enough, and the reason, which the report shows."""
    given, known = read_point(answer), read_point(truth)
    if given is None or known is None:
        return False, "the answer is no point"
    distance = math.dist(given, known)
    return distance <= (10 if rules.tolerance is None else rules.tolerance), f"{distance:.1f} pixels away"


register("point", same_point)
if __name__ == "__main__":
    sys.exit(main(["mmpr", *sys.argv[1:]]))
