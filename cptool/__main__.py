from cptool.cli.main import main

main()
