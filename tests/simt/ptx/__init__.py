"""The compiler's PTX on the simulated device: translated into C++, in the place of the compiled sources.

    source.py       reads PTX: kernels, registers, instructions, the source lines that they come from
    operands.py     types and operands as C++
    arithmetic.py   \\
    memory.py        > one rule for each kind of instruction
    collective.py   /
    translate.py    a kernel as a C++ function on ../runtime/translated.h
    build.py        nvcc, g++ and what they made before
    loader.py       a Simulator whose kernels are the translated ones
"""
