"""Mutation testing: small faults are put into the code one at a time, and the tests have to notice each.

    python -m scripts.mutation --paths airflow_provider_siliconflow/jobs/identity.py
    make mutation

    mutants   finds the faults: AST nodes and what takes their place
    choosing  which tests execute a fault, and how long each takes
    workers   forked processes with a time limit, whose answers are collected
    session   the pytest session in which all that happens
    report    the score, and the faults that no test noticed

A run of the unit tests takes a minute and a start of pytest with Airflow several seconds, so neither happens once
per mutant. One process imports everything and collects the tests; for each mutant it forks a child, which
replaces the code of one function in memory and runs only the tests that execute the faulty line, until one of
them fails. That takes tenths of a second. A fault in what runs at import (a constant, the default of a field)
needs the modules imported again: the child forgets ours and starts pytest on the chosen test files.

All of it works on a copy of the tree; the working tree is only read. Children have limits on time, memory and
file size, and their own folder for temporary files.

mutmut and cosmic-ray were tried on two modules of `jobs/`: mutmut, which chooses tests per function, needed ten
minutes for 98 of its 601 mutants, many of them in message texts; cosmic-ray starts pytest for each of its 919
mutants, which would be an hour and a half.
"""
