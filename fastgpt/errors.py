"""The one exception for what a user can put right."""


class UserError(Exception):
    """Something a user can cause and mend: a missing file, a shape that does not fit, a full disk.

    Its message is one line that names the thing and says what to do. The command line prints that line alone and
    exits with code 2; as a library call it is an ordinary exception.
    """
