#!/bin/sh
# Runs lowrank-tune in a job's working directory, with the Python that the cluster's Ray runs on: where Ray was started
# from a virtual environment that is not activated, the one on the PATH is another.
#   sh launch.sh COMMAND ...
# Ray's job supervisor is this shell's parent's parent or nearer, and a child of the raylet, whose command line names it.
process=$$
for _ in 1 2 3 4 5; do
    process="$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status" 2>/dev/null)"
    python="$(tr '\0' '\n' <"/proc/$process/cmdline" 2>/dev/null | sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p')"
    if [ -x "$python" ]; then break; fi
done
# The cluster's own idea of where jobs are submitted must not send this one round in a circle.
unset RAY_API_SERVER_ADDRESS
exec "${python:-python3}" -m lowrank_tune "$@"
