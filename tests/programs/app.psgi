# An application for starman.
use strict;
use warnings;

sub {
    my ($seconds) = $_[0]{PATH_INFO} =~ m{^/slow/([\d.]+)};
    select undef, undef, undef, $seconds if $seconds;
    my $body = "gen=$ENV{HANDOVER_GENERATION} pid=$$";
    [200, ['Content-Length' => length $body], [$body]];
};
