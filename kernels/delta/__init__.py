"""The gated delta rule with channel-wise, scalar or absent gates. The derivation stands in README.md beside this file."""
