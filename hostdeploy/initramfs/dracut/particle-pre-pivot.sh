#!/bin/sh
# Sets up the root of a deployment in the place of the physical root, in an initramfs of
# dracut without systemd.

modprobe -q -a erofs overlay loop
/usr/lib/particle/particle-init-root "$NEWROOT"
case $? in
	0 | 3) ;; # set up, or not Particle's boot
	*)
		# The program has said why on the console. Where no shell may come it has restarted
		# the machine and never gets here.
		emergency_shell "particle: the root could not be set up"
		;;
esac
