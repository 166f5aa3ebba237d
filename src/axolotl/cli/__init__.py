"""The doors: one module per command, from arguments to calls into the rooms below.

`main.py` holds the table of commands and imports nothing but click, so that `axolotl --help` answers at once; a command's
module is imported when the command runs. A new command is a row in `main.COMMANDS`, a click definition in `commands.py`
and a module here with `do_cli(config, **kwargs)`.
"""
