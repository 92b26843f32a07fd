"""`medley train`: its commands together."""

from app.cli import train, train_condition, train_gates, train_retriever

sub = train.sub
sub.command(epilog=train_condition.EPILOG)(train_condition.condition)
sub.command(epilog=train_retriever.EPILOG)(train_retriever.retriever)
sub.command(epilog=train_gates.EPILOG)(train_gates.gates)
