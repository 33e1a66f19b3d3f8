"""`"recsys": {"parallel": "auto"}`: the grid, the micro-batches and what the data axis does, chosen by measurement.

facts    what this model costs on these devices and links: lines through measured points. Pure
plan     one way to train, as keys of the config; all ways that a cluster and a config leave open. Pure
predict  the seconds of a step of a plan, by part. Pure
rule     which plan is taken, and the reason in words. Pure
layers   measures layers and the optimizer
links    measures sums on the data axis and transfers between stages
choose   measure, compare, take one: what the Trainer calls
"""
