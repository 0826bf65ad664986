"""Research on adapters: what the package's claims rest on, and what was tried.

One way only: a study may import all of the package, and nothing outside this folder may import a study. What
users need moves out of here into the layer that it belongs to; what only a study needs never leaves. Studies
take their other packages from the extra ``studies``, write results as JSON beside the command, the versions
and the device that gave them, and are run by the thin commands of the repository's ``scripts/``.

============== ======================================================================
compare        methods on the same batches, each at its best rate, tested item by item
benchmark      time and memory of steps, fits and generation; batching; several GPUs
agreement      the package's evaluation beside the lm-evaluation-harness
teachers       whether gates and gradients find structure that is known
backends       loss curves of backends beside the noise of the seed
shared_prompt  scoring with and without a shared prompt
spectra        singular values and effective ranks of trained updates
reasoning      tasks whose answers are checked by rule, and the rule
filters, gates filters chosen before a run; pictures of a run's gates
common         what these have in common
============== ======================================================================
"""
