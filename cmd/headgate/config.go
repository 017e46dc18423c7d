package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/headgate-io/headgate/classify"
)

func configCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Check or print the configuration"}
	cmd.AddCommand(&cobra.Command{
		Use:   "check",
		Short: "Say whether the configuration is right, and if not what is wrong",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			if _, err := classify.Load(cfg.Provider.Profile); err != nil {
				return exitError{exitConfig, fmt.Errorf("provider.profile: %w", err)}
			}
			out := cmd.OutOrStdout()
			fmt.Fprintf(out, "The configuration is right: provider %s at %s, profile %s, %d operations.\n",
				cfg.Provider.Name, orElse(cfg.Provider.BaseURL, "(no base_url: a worker cannot run)"), cfg.Provider.Profile, len(cfg.Operations))
			if a := cfg.Provider.Auth; a.Header != "" && os.Getenv(a.Env) == "" {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: the environment variable %s, which holds the API key, is not set here\n", a.Env)
			}
			return nil
		},
	})
	show := &cobra.Command{
		Use:   "print",
		Short: "Print the configuration in effect: defaults, file and environment, secrets left out",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(cmd)
			if err != nil {
				return err
			}
			text, err := cfg.Redacted()
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
	show.Flags().Bool("effective", true, "with defaults and the environment applied, which is always so")
	cmd.AddCommand(show)
	return cmd
}
