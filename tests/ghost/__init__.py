"""A CUDA build of torch on a machine without a GPU: see runtime.c for what the ghost does and what it cannot show.

    python -m tests.ghost ARGUMENTS...      python ARGUMENTS under the ghost, as in `python -m tests.ghost -m train`
    python -m tests.ghost.check             all checks, as .ci/gpu runs them

Both in a virtual environment whose torch is a CUDA build. Files

    runtime.c, driver.c, libraries.c        the stand-ins, one library
    build.py                                compiles it and gives the environment in which a process runs on it
    log.py                                  what was called, read from Python
    stand_ins.py                            what a GPU would have to answer, made up
    layers.py, overlap.py, ranks.py, scaled_mm.py      the checks, with traffic.py, which counts bytes
    processes.py                            two processes that train together
"""
