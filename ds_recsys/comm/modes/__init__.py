"""When replicas tell each other what they have learned: the modes of `recsys.data_parallel`.

flat (a rank's weights in one buffer), travel (an average on its way) -> base (what all modes do to an engine) -> delayed;
local (replicas that train alone) with fragments, outer -> rounds (local_sgd, diloco); state (files), callback;
attach (`data_parallel`).
"""
