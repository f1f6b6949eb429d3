"""A study: the same cohort, seeds, selection rule and tuning budget for several arms, run one by one and compared."""
