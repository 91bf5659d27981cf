"""Which kernel family serves a problem on a GPU: verified before it serves, chosen by the times of the user's own calls.

Pure logic without torch: clocks, events, comparisons and processes are the caller's functions.

    record.py        what is known of one device, in a text file that several processes share
    verification.py  stage 1: a family's cases in a child process with a time limit
    choice.py        stage 2: on the first calls of a problem the families take turns; the fastest correct one is kept
"""
