"""`python -m optimum_qvlm PROGRAM ...`: run a program with the method registered.

The interpreter has imported the package, and so registered the method, before it comes here.
"""

from optimum_qvlm.cli.program import main

if __name__ == "__main__":
    main()
