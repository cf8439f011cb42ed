"""The programs of hf_lookbehind: `hf-lookbehind <program> --flag value ...`."""
