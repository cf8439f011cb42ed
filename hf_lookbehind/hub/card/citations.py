"""The papers behind the methods, as BibTeX; those of the ascents are in `config.ASCENTS`."""

LOOKBEHIND = r"""@inproceedings{mordido2024lookbehind,
  title={{Lookbehind-SAM}: k steps back, 1 step forward},
  author={Mordido, Gon{\c{c}}alo and Malviya, Pranshu and Baratin, Aristide and Chandar, Sarath},
  booktitle={International Conference on Machine Learning},
  year={2024},
  url={https://arxiv.org/abs/2307.16704}
}"""
LOOKAHEAD = """@inproceedings{zhang2019lookahead,
  title={Lookahead Optimizer: k steps forward, 1 step back},
  author={Zhang, Michael R. and Lucas, James and Ba, Jimmy and Hinton, Geoffrey},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019},
  url={https://arxiv.org/abs/1907.08610}
}"""
