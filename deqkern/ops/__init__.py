from .reference import (
    anderson_gram,
    anderson_mix,
    anderson_solve,
    band_moments,
    ddim_scan,
    dct2,
)

