"""The same faults run on Ekiden and on the trainers that people use today; `compare.py` is the program.

`trial` starts one process of a training command and kills it; `torch_scripts`, `huggingface`, `lightning_trainer` and
`ekiden_trainer` are those commands; `faults` holds the drivers, `power_cut_rows` the one that needs a disk image.
"""
