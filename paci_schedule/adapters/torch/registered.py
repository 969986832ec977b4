"""Importing this module registers the schedule's name: what torchtitan's ``experimental.custom_import`` can do."""

from paci_schedule.adapters.torch import register

register()
