"""Evaluation of a frozen encoder: encode every split once, fit on train, select on val, score test."""
