"""The ClientApp of simulations: clients are made from the run's scenario."""

from fedsynth.clients.app import client_app, simulation

app = client_app(simulation)
