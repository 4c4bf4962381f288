"""Collecting the samples of one step, and evaluation: prompts in, scored groups out.

source --groups--> generate each sibling --> score --> filter --> admit --> groups of the step
   ^                    |                                            |
   +---- unfinished, surplus (partial rollout) <---- abort <---------+ enough
"""
