"""ntp: next-token prediction, the plain objective of every twin."""

from patchbay.train._objectives._objective import Objective

OBJECTIVE = Objective
