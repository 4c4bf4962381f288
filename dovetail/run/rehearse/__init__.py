"""The user's functions tried out before anything is loaded: small inputs in, contracts checked.

    parent --one request--> child process --one verdict per hook--> parent
      |                       load, match, call with made-up samples, look at what came back
      +-- a hook that hangs, exits or crashes costs its child, and the next one goes on

Whatever user code does - hang, exit, crash, print, leave state behind - it does in a process that
is thrown away. The child has neither model nor training data; torch is there only for hooks of the
training side.
"""
