"""What a person sees of a running command."""

import logging
import warnings


def log_to_console(rank: int = 0) -> None:
    """Progress on stderr, from rank 0 alone; the run folder's logs hold what every rank says."""
    # Deprecations inside DeepSpeed and MONAI, once per rank and call site: nothing a user could act on
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"monai\.inferers")
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("mstkd").setLevel(logging.INFO)
    console = logging.StreamHandler()
    console.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.getLogger().addHandler(console)
