"""Agents that speak another protocol than ours, trained token by token.

harness in a sandbox --Chat Completions / Messages--> adapter --/generate--> the run's router
                                                         |
                                    every turn's ids and logprobs --> TrajectoryManager
                                                                           |
                                                 finish_session --> samples to train on
"""
