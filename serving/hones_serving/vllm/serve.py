"""`python -m hones_serving.vllm.serve` is `vllm serve`, which starts several API servers, in every build of vLLM.

The `vllm` command itself asks for the version of a package named vllm, which not every build is.
"""


def main() -> None:
    """Be ``vllm serve`` with the arguments of this process."""
    # Here, because every process that vLLM starts imports this module.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args()
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":
    main()
