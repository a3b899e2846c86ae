"""What makes one run differ from another: how BAD was made otherwise than GOOD, ranked by what likely explains it.

`trainrt.compare(good, bad)` and `trainrt compare GOOD BAD`. Reads records alone, without TensorFlow.
"""

from trainrt.comparison.behaviour import Departure, Start
from trainrt.comparison.difference import KINDS, Difference
from trainrt.comparison.ranking import Comparison, compare

__all__ = ["KINDS", "Comparison", "Departure", "Difference", "Start", "compare"]
