"""How tokens reach their experts and come back: the names that engine, simulator, settings and command line share."""

from typing import Literal

# Results go home again in one step ("all_to_all") or in two, over the same local rank of the other node
# ("hierarchical"), or the token stays where its heaviest expert is ("coherent").
DispatcherName = Literal["all_to_all", "hierarchical", "coherent"]
# One result per token and expert ("exact": the same bits whatever the plan), or one sum per token and rank ("partial").
CombineMode = Literal["exact", "partial"]
