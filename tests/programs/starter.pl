# By the convention of Server::Starter: SERVER_STARTER_PORT, and a loop that blocks in accept.
use strict;
use warnings;
use IO::Socket::INET;

my ($port, $fd) = $ENV{SERVER_STARTER_PORT} =~ /^(.*)=(\d+)$/ or die "no SERVER_STARTER_PORT";
my $listener = IO::Socket::INET->new_from_fd($fd, 'r+') or die "fd $fd: $!";
my $stop = 0;
# Without SA_RESTART, so that accept ends.
use POSIX qw(:signal_h);
sigaction(SIGTERM, POSIX::SigAction->new(sub { $stop = 1 }));
until ($stop) {
    my $client = $listener->accept or next;
    my ($length, $body) = (0, "gen=$ENV{SERVER_STARTER_GENERATION} pid=$$");
    while (my $line = <$client>) { last if $line =~ /^\r?\n$/ }
    $length = length $body;
    print $client "HTTP/1.1 200 OK\r\nContent-Length: $length\r\nConnection: close\r\n\r\n$body";
    close $client;
}
