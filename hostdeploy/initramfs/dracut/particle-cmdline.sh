#!/bin/sh
# Where no shell may come, a boot that fails before Particle's set-up (the physical
# root is not found, say) restarts the machine too, so that the boot loader can fall
# back. rd.shell and rd.emergency= on the kernel command line go first.

if getarg composefs.digest= > /dev/null || getarg composefs= > /dev/null || getarg particle.manifest= > /dev/null; then
	if ! [ -e /usr/lib/particle/shell ] && ! getargbool 0 particle.shell \
		&& ! getarg rd.shell > /dev/null && ! getarg rd.emergency= > /dev/null; then
		mkdir -p /etc/cmdline.d
		echo "rd.shell=0 rd.emergency=reboot" > /etc/cmdline.d/95particle.conf
		unset CMDLINE
	fi
fi
